"""hetcomp: compiles Mixture-of-Experts language models for one workstation."""
