"""Decoding: how a canvas of masks becomes text. One denoising step, `step.step`:

    rows       what each row is: tokens, which masks it may fill now, how many      progress, blocks
      |                                         (the cache method and the strategy may narrow that)
    selected   what the cache method wants computed of it                 CacheMethod.select
      |
    forward    pack -> walk over the layers -> hidden states              queries, models, turns
      |          where a prediction is wanted (Strategy.readable, CacheMethod.readable)
    logits     guidance, suppress, the user's hook, Strategy.adjust       predict
      |
    candidate  drawn from the tempered and filtered distribution          sampler
    confidence how sure the model is of it; times the prior, plus noise   predict: Proposal
      |
    chosen     the candidates that are committed                          Strategy.choose
    revoked    tokens that become masks again                             Strategy.revoke
      |
    observe    the cache method learns what happened                      CacheMethod.observe
    advance    rows go to their next step, or block; back to the top      progress

`start` checks the arguments and makes the constants (`state.Setup`) and the first state
(`state.DecodeState`); the drivers in `loop` repeat the step. docs/architecture.md has the rest.
"""
