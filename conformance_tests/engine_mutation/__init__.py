"""Proof that the conformance suite catches: platforms that are wrong in one way each, and right ones that differ.

    scripts/mutation

Every faulty platform wraps the host's, names its fault, its tier and the case that kills it. The suite is good if none
survives, and fair if no right variant fails. Not part of the wheel, and never imported by the suite.
"""
