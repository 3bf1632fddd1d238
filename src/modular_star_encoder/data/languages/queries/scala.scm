(function_definition name: (_) @name body: (_) @body) @function
(function_declaration name: (_) @name) @type
[(class_definition name: (_) @name) (object_definition name: (_) @name)
 (trait_definition name: (_) @name) (enum_definition name: (_) @name)] @scope
(type_definition name: (_) @name) @type
[(comment) (block_comment)] @comment
