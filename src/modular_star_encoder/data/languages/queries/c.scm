(function_definition type: (_) declarator: (_) @declarator body: (_) @body) @function
[(struct_specifier name: (_) @name body: (_)) (enum_specifier name: (_) @name body: (_))
 (type_definition declarator: (_) @name) (preproc_function_def name: (_) @name)] @type
(comment) @comment
(string_literal) @verbatim
