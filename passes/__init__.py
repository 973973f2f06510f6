"""The compiler's passes, in order.

``capture`` traces one call of a module with torch.export into ATen ops; ``clean`` inlines sub-graphs, makes torch.cond
one op, and drops assertions and aliases; ``cast_explicitly`` writes out the casts of autocast; ``pin`` makes integers
that the model reads out of its inputs constants; ``decompose`` opens composite ops that the op table does not know;
``functionalise`` removes in-place ops; ``canonicalise`` gives every op the one form that keeps what relevance needs
(norms with their statistics, attention with its log-sum-exp); ``recognise`` marks groups that are one thing to
relevance. ``analyse`` finds where relevance is read and what depends on it; ``assign_rules`` lets the composite give
every live op its rule; ``specialise`` leaves out the rows that no relevance comes from. ``insert_relevance`` walks
backwards and writes the rules behind the forward graph, reading forward values through promises, of this run or of a
reference run on other inputs; ``simplify`` tidies up; ``fuse`` puts kernels of the relevance dialect in the place of
the ops they compute; ``compress`` gives what is read of a value a small form; ``set_precision`` casts where relevance
has another dtype; ``lower_promises`` turns promises into deferred buffers; ``fuse_elementwise`` makes one kernel of
pointwise ops that follow each other; ``partition`` cuts the joint graph in two; ``prepare_weights`` makes inputs of
what weights alone decide; ``share_memory`` lets ops write over what nothing reads any more; ``plan_memory`` says how
long buffers live and what the peak will be; ``codegen`` makes both halves callable.

Every pass is a pure ``Program -> Program``; ``pipeline.py`` holds their order, runs, times and verifies them. Sizes
that differ from call to call are literals of the graph (``sizes.py``), the branches of a torch.cond programs inside
it (``branches.py``).
"""
