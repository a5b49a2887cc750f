"""torchrun's rendezvous on several hosts: any minority of them may be lost, whichever it is.

`register` decides, purely; `replica` holds the values on a listed host; `replicated` is the store that torch's agent sees.
"""
