[(function name: (_) @name) (bind name: (_) @name)] @function
[(data_type name: (_) @name) (newtype name: (_) @name) (type_synomym name: (_) @name)] @type
(class name: (_) @name) @scope
(instance name: (_) @name) @extension
(comment) @comment
