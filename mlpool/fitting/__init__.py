"""The pool alone, on layer states of a frozen base that are taken once: many candidates in minutes. `mlpool fit`."""
