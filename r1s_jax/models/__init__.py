"""The networks: the decoder policy and its Hugging Face form."""
