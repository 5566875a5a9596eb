"""One run in several processes: who is there, what they decide together, and how a base is divided among them.

The processes are started by somebody else (``torchrun``, ``accelerate launch``). Each runs the same command; a step's
micro-batches are dealt out, gradients are summed, and everything else is the same in all of them. The first alone reads
the network, writes and speaks.

`launched` (what the environment says, without torch) → `world` (what is decided together) → `joining` (the group of
processes), `gradients` (their sum), `sharding` (FSDP2), `sizes` (bytes for each), `skeleton` (a model without values) →
`loading` (each process reads its own share).
"""
