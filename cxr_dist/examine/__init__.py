"""What a trained network goes by: where it looks, what it does without the lungs, and what it can stand."""
