(create_function (object_reference) @name) @function
[(create_table (object_reference) @name) (create_view (object_reference) @name)] @type
[(comment) (marginalia)] @comment
