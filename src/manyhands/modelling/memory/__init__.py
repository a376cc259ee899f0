"""What a plan holds in memory, in parts, before anything is started (`footprint`), and whether it fits (`fitting`)."""
