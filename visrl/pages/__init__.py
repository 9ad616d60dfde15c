"""Pages: what every HTML page shares.

html        a template becomes a self-contained page
figures     SVG figures, and curves of training logs
panels      which curves those are
draw        boxes on images
wording     numbers as a person reads them
"""
