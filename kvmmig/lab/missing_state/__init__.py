"""What a guest does that is moved without one piece of its state: for each piece, a guest that misses it."""
