"""Workers: they take stages out of the queue and do them."""
