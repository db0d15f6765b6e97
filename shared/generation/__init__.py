"""What a model says: tokens picked from logits, prompts together, answers with their ends."""
