"""The networks: decoder policy and text encoder, and their Hugging Face form, both ways."""
