"""The fifty class names of LongBench's TREC, spelled as in its field `all_classes`.

Source: LongBench's `trec.jsonl` (https://huggingface.co/datasets/THUDM/LongBench); the classes are TREC's (Li and Roth,
2002). The paper's parquet files lack the field.
"""

CLASSES = [
    *("Food", "Date", "Order, rank", "Speed", "Disease and medicine", "Word with a special property", "Abbreviation"),
    *("Language", "Letter like a-z", "Other entity", "Animal", "Expression abbreviated", "Price"),
    *("Techniques and method", "Musical instrument", "Mountain", "Currency name", "Event", "Product", "State"),
    *("Individual", "Organ of body", "Reason", "Manner of an action", "City", "Religion"),
    *("Invention, book and other creative piece", "Distance, linear measure", "Temperature", "Postcode or other code"),
    *("Size, area and volume", "Sport", "Country", "Other location", "Lasting time of somethin", "Equivalent term"),
    *("Description of something", "Weight", "Vehicle", "Color", "Other number", "Definition of something"),
    *("Element and substance", "Description of a person", "Symbols and sign", "Number of something", "Plant"),
    *("Percent, fraction", "Group or organization of person", "Title of a person"),
]
