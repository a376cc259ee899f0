"""Running a plan on real workers: launch, loop, sampler, checkpoints, metrics, progress."""
