"""How policy and search engine speak: tags, prompts, tokenizer, observations and their parser."""
