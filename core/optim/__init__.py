"""The optimizer step, beside the backward pass or after it, and the learning rate's schedule."""
