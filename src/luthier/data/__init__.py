"""From outside files to prompts and completions: text only, no torch."""
