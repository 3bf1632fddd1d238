(function_definition name: (_) @name body: (_) @body) @function
(method_declaration name: (_) @name body: (_) @body) @function
[(class_declaration name: (_) @name) (interface_declaration name: (_) @name)
 (trait_declaration name: (_) @name) (enum_declaration name: (_) @name)] @scope
(comment) @comment
[(heredoc) (nowdoc) (string) (encapsed_string)] @verbatim
