(function_item name: (_) @name body: (_) @body) @function
(function_signature_item name: (_) @name) @type
(macro_definition name: (_) @name) @type
[(struct_item name: (_) @name) (enum_item name: (_) @name) (union_item name: (_) @name)] @type
(type_item name: (_) @name) @type
(trait_item name: (_) @name) @scope
(mod_item name: (_) @name body: (_)) @scope
(impl_item type: (_) @name) @extension
[(line_comment) (block_comment)] @comment
[(raw_string_literal) (string_literal)] @verbatim
