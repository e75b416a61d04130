"""The conformance suite: what a platform must do, with references and cases that a wrong one does not pass.

    pytest --pyargs engine_conformance --platform=NAME

L0 device, L1 operations, sampling and experts, L2 attention, L3 KV layouts, L4 communicator, L5 graphs, L6 the engine
end to end, L7 robustness, L8 performance sanity.
"""
