"""What a log costs where there are more ranks than a machine has: measured in part, modelled in part.

Four questions, four files: *who sends what* (`world`, `workloads`), *what does a rank compute and
hold* (`measure`), *how long does the network take* (`model`), and *what does that come to*
(`answers`).
"""
