"""What a recipe needs of a TPU slice, said before there is one: compiled ahead of time and counted.

chips      what a chip of each kind has, the slices by name, meshes of devices that are not here
published  config.json of published models, as shapes are all that is needed
programs   a recipe's train step and rollout, lowered on shapes
hlo        what a compiled program moves: collectives and memory, loops counted
weigh      a recipe compiled and weighed: memory by kind, time by roofline, knobs
tell       what was found, as text
"""
