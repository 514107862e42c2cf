"""The command line: one file a verb, thin over ``squamata.pipeline``; ``main`` registers them."""
