"""What a model is worth: scores with intervals, answer choices, losses, and paired differences."""
