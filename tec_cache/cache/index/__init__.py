"""A cache's index: what its commit records say of all units, in one file for the views and one for each target set.

Records are the truth. An index is made of them and can be thrown away: it spares readers of large caches a request
and a parsing for every unit. It is used only while it is whole (its checksums say so) and covers what is wanted; each
unit's record must still be there, with the same size, when the unit is opened.
"""
