"""Text to tensors: prompts as at inference, masks that cover the completion, packed batches."""
