"""What a plan costs, before it is run: operations and bytes of a step, published formulas, predictions."""
