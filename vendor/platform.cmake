# What is chosen per platform; of the options, where the user has not said otherwise.
if(APPLE)
    option(GGML_METAL "ggml: use Metal" ON)
    option(GGML_METAL_EMBED_LIBRARY "ggml: embed Metal library" ON)
    set(CMAKE_INSTALL_RPATH "@loader_path")
else()
    option(GGML_METAL "ggml: use Metal" OFF)
    set(CMAKE_INSTALL_RPATH "$ORIGIN")
endif()
