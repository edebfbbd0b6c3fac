"""Private training: joins models, privacy and data into the step and the loop."""
