"""Episodes and the loop that carries them between engine and retriever."""
