"""How the bundled base policy of `tiny` is made: texts, next-token loss, what became of it."""
