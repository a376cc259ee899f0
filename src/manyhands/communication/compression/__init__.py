"""What is sent instead of a dense vector (survey §VI-B): sparsifiers, quantizers, low rank, lossless codes.

`compressors` is the table of contents: a new scheme is one file, one line here and one row in the tests. What all have
in common (error feedback, promises) is `compressor`; how the payloads of most meet is `one_shot`.
"""

from manyhands.catalogue import Catalogue

_HERE = "manyhands.communication.compression"

compressors = Catalogue(
    "compressor",
    {
        "strom": f"{_HERE}.strom:Strom",
        "strom_adaptive": f"{_HERE}.strom_adaptive:StromAdaptive",
        "top_k": f"{_HERE}.top_k:TopK",
        "random_k": f"{_HERE}.random_k:RandomK",
        "dgc": f"{_HERE}.dgc:DeepGradientCompression",
        "one_bit": f"{_HERE}.one_bit:OneBit",
        "sign_sgd": f"{_HERE}.sign_sgd:SignSGD",
        "terngrad": f"{_HERE}.terngrad:TernGrad",
        "qsgd": f"{_HERE}.qsgd:QSGD",
        "two_bit": f"{_HERE}.two_bit:TwoBit",
        "int8": f"{_HERE}.int8:Int8",
        "float16": f"{_HERE}.half:Float16",
        "bfloat16": f"{_HERE}.half:BFloat16",
        "flexpoint": f"{_HERE}.flexpoint:Flexpoint",
        "powersgd": f"{_HERE}.powersgd:PowerSGD",
        "entropy": f"{_HERE}.entropy:Entropy",
        "none": f"{_HERE}.none:Uncompressed",
    },
)
