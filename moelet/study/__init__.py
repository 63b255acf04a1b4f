"""Does it pay? `moelet prove`: a plan, runs, a verdict."""
