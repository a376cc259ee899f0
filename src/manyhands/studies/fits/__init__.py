"""Laws fitted to what a study measured: each parameter with its 95 % interval, or the reason why there is none.

    amdahl           S = 1 / (s + (1 − s)/p)                        speed-up of a fixed amount of work
    gustafson        S = p − s (p − 1)                              speed-up where the work grows with the workers
    usl              X = λ p / (1 + σ (p − 1) + κ p (p − 1))        throughput that can peak and fall
    noise_scale      E|G_B|² = |G|² + tr(Σ)/B                       up to which batch the gradient gets better
    critical_batch   (S/S_min − 1) (E/E_min − 1) = 1                up to which batch training gets shorter
    power_law        y = a x^b                                      does variance fall as 1/P
    slope            y = a + b x                                    does anything change at all
    bootstrap        any statistic of repeats; bootstrap_ratio for pairs

A fit never raises over its data: where they cannot carry it, the answer is a `CannotFit` that says what there is and
what would be needed. Either answer has ``sentence()``; a fit has ``predict`` too. Each law needs one more distinct
worker count or batch than it has unknowns, since a curve through every point says nothing about the law.

A law is refused, too, when it does not follow the data: when it misses typically by more than a stated factor, or when
the mean of the data would describe them better (`manyhands.studies.fits.points.follows`).

    from manyhands.studies import fits

    fit = fits.amdahl([(1, 1.0), (2, 1.82), (2, 1.79), (4, 2.98), (4, 3.07)])
    fit.sentence(), fit.predict(8)

Sources:
    G. Amdahl, Validity of the single processor approach to achieving large scale computing capabilities, AFIPS 1967.
    J. Gustafson, Reevaluating Amdahl's law, CACM 31(5), 1988.
    N. Gunther, A simple capacity model of massively parallel transaction systems, CMG 1993;
        Guerrilla Capacity Planning, Springer 2007.
    S. McCandlish, J. Kaplan, D. Amodei, OpenAI Dota team, An empirical model of large-batch training, 2018,
        arXiv:1812.06162.
    B. Efron, Bootstrap methods: another look at the jackknife, Annals of Statistics 7(1), 1979.
    Student, The probable error of a mean, Biometrika 6(1), 1908.
"""

from manyhands.studies.fits.estimate import CannotFit as CannotFit
from manyhands.studies.fits.estimate import Estimate as Estimate
from manyhands.studies.fits.estimate import bootstrap as bootstrap
from manyhands.studies.fits.estimate import bootstrap_ratio as bootstrap_ratio
from manyhands.studies.fits.noise import CriticalBatch as CriticalBatch
from manyhands.studies.fits.noise import NoiseScale as NoiseScale
from manyhands.studies.fits.noise import critical_batch as critical_batch
from manyhands.studies.fits.noise import noise_scale as noise_scale
from manyhands.studies.fits.noise import noise_scale_of_two as noise_scale_of_two
from manyhands.studies.fits.scaling import AmdahlFit as AmdahlFit
from manyhands.studies.fits.scaling import GustafsonFit as GustafsonFit
from manyhands.studies.fits.scaling import amdahl as amdahl
from manyhands.studies.fits.scaling import gustafson as gustafson
from manyhands.studies.fits.straight import PowerLaw as PowerLaw
from manyhands.studies.fits.straight import SlopeFit as SlopeFit
from manyhands.studies.fits.straight import power_law as power_law
from manyhands.studies.fits.straight import slope as slope
from manyhands.studies.fits.student import student_t as student_t
from manyhands.studies.fits.universal import UniversalFit as UniversalFit
from manyhands.studies.fits.universal import usl as usl

__all__ = [
    "AmdahlFit",
    "CannotFit",
    "CriticalBatch",
    "Estimate",
    "GustafsonFit",
    "NoiseScale",
    "PowerLaw",
    "SlopeFit",
    "UniversalFit",
    "amdahl",
    "bootstrap",
    "bootstrap_ratio",
    "critical_batch",
    "gustafson",
    "noise_scale",
    "noise_scale_of_two",
    "power_law",
    "slope",
    "student_t",
    "usl",
]
