"""The jobs that users ask for, from the model to the result; a terminal or a worker runs them."""
