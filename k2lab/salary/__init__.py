"""A salary table, tested with care: does remote work change pay, and is the answer a finding?"""
