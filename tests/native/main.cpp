// The CPU kernels without Python: native_test GOLDEN.json [--expect KERNEL,KERNEL,...]
//
// One line for each group with the kernels that ran. Exit status 1 on any difference, or where the kernels
// this CPU runs are not the expected ones: a test that quietly ran another kernel is no test.
#include "groups.h"
#include "support.h"

#include <cstdio>
#include <cstring>

using namespace tautorch::tests;

int main(int argc, char **argv) {
    if (argc < 2) {
        std::fprintf(stderr, "usage: %s golden.json [--expect scalar,...]\n", argv[0]);
        return 2;
    }
    std::string runs;
    for (const tautorch::Isa *isa : kernels())
        runs += (runs.empty() ? "" : ",") + std::string(isa->name);
    std::printf("kernels of this CPU: %s\n", runs.c_str());
    if (argc > 3 && std::strcmp(argv[2], "--expect") == 0 && runs != argv[3]) {
        std::printf("FAILED: expected %s\n", argv[3]);
        return 1;
    }
    test_golden(argv[1]);
    test_int8_linear();
    test_longest_rows();
    test_special_rows();
    test_half_precision();
    test_weight_only();
    test_lowrank();
    test_sparse_linear();
    test_sparse_float();
    test_int8_conv2d();
    test_weight_only_conv2d();
    test_sparse_conv2d();
    std::printf("%s\n", failures() ? "FAILED" : "all equal");
    return failures() ? 1 : 0;
}
