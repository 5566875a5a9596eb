"""Tasks beside language modelling: what their rows are, which head they train, how they are measured."""
