def page(e): return ""
