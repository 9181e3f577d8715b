"""All that is not API: what comes in is folded, reduced over ranks, and viewed.

Folders follow the way of the data. `runtime` and `device` say what is around us, `sketch` and `fold`
what a metric's state is, `reduce` and `exchange` how the ranks' states become one, `view` what is
shown of that, `intake` where metrics come in.
"""
