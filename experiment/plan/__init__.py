"""What is to be run: plan.yaml, its presets, the environment and the command line."""
