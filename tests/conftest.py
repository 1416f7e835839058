import scipy.linalg  # noqa: F401  its threads can be limited only once it is loaded
import threadpoolctl
import torch

# Small matrices: more threads would only wait for each other. And sums are added in one order.
torch.set_num_threads(1)
threadpoolctl.threadpool_limits(1)
