"""What happens between a prompt and a training batch: sampling, added rows, packs."""
