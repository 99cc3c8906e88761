"""Tables of runs, of which several machines may each do some rows: what is run, how a row is judged, what came out.

``tables`` says which rows there are, ``execute`` runs one, ``compositions`` judges it by several image scores,
``results`` keeps the rows in a CSV and sums them up.
"""
