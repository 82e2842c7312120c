"""`headroom classic`: the learners' experiment, step by step in the terminal."""
