"""What a training begins with, what it is judged by, and the figures it leaves behind; above the rest of `named`."""
