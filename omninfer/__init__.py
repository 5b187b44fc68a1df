"""Inference over content-addressed weights: plan the layers, assemble a stage, run the pipeline.

The map, from the ground up:

    arch  tokenizer  chat  sampling  plan  frames      pure
    engines                                            mlx, ort and numpy behind one interface
    sources  profile  stage                            weights out of the store; lending compute
    pipeline                                           the coordinator
    cli                                                `omni run`, `omni chat`
"""
