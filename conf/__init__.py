"""The configuration groups, installed as `rltoken.conf` (Hydra's search path is `pkg://rltoken.conf`).

This file is needed: an editable install maps `rltoken.conf` to this folder only when it is a regular package.
"""
